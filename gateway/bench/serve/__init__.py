"""Load on a running endpoint: requests at a rate or one after the other, and what their clients saw."""
