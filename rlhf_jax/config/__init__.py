"""Every option of every command: name, default and help text."""
