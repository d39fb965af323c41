"""The conformance suite: what a device must do to serve Quire, as tests that anybody can run."""
