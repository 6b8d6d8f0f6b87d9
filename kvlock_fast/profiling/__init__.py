"""Where the time of an edit goes: `kvlock-fast profile`."""
