"""What a model costs on this machine, measured through the engine that serves."""
