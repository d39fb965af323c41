"""The backends that come with Quire, through the same entry points and contract as any other."""
