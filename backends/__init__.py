"""The backends that come with Quire. They have no privilege: the same entry points, the same contract."""
