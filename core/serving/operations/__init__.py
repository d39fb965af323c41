"""What keeps a server safe and visible: keys, limits, deadlines, logs, traces, supervision."""
