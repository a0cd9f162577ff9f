"""Tools of the project's own making and proving; nothing here is installed."""
