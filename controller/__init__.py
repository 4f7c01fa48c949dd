"""The program on the test host: command line, runs, store, reports."""
