"""Signal stores: what a teacher said about prepared rows, kept in files and read again row by row.

A store is one folder for one question to one teacher about one set of prepared rows:
`store.json` says what it is of and which rows each part holds; `part-NNNNNN.arrow` holds the numbers and `part-NNNNNN.json`, written
after it, says that it is complete; `manifest.json` ends a finished store; `lease.json` names who fills it now.
"""
