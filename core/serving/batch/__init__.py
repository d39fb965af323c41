"""Files of requests, answered line by line: `quire batch`."""
