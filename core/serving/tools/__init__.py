"""What a model says, taken apart: thoughts, calls of tools, and the text that is left."""
