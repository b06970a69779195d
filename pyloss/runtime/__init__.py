"""How calls of the core run: on which device, in which precision, recorded for replay, measured."""
