"""What a memory service tells others of its pools, and what it learns of theirs; never on the path of a step."""
