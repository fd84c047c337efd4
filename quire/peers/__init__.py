"""Other servers' engines, each in an interpreter of its own, asked for the same work in alternation with ours."""
