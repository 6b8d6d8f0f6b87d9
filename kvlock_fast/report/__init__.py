"""Pages and pictures about an edit."""
