"""Steps on a GPU: state that lives there, captured decode steps, two steps in flight."""
