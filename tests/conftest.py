"""What holds for all tests."""

import signal

# A shell that starts the tests in the background has SIGINT ignored, and every process that a test
# starts would inherit that: a Ctrl-C that the test sends would then do nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
