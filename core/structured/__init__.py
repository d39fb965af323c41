"""Output that keeps to a grammar: what is asked for, how it compiles, where each output is."""
