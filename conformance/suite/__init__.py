"""The test files of the suite; pytest collects them, `quire conformance run` runs them."""
