"""How good edits are: presets, neighbours, windows and foreground-only computation, judged from pixels."""
