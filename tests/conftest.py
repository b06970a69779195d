"""What all tests need of the process."""

import signal

# A shell's background job starts with Ctrl-C ignored; the tests of Ctrl-C, and the processes they start, need Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
