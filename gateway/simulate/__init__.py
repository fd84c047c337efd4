"""`quire simulate`: a trace through the real scheduler and the real memory core, under several policies, no model."""
