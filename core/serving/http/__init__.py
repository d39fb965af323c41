"""What all APIs share of HTTP: the app, what lies around it, bodies, events and errors."""
