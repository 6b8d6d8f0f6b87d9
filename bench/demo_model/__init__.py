"""How the demo model is trained: its data, its networks, its stages, and its export to kvlock_fast/demo/model."""
