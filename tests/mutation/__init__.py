"""Do the tests notice when the mathematics is wrong? Small faults are put into objectives and signals, one at a time."""
