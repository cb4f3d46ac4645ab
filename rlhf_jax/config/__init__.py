"""Every option of every command: its name, its default and what it means."""
