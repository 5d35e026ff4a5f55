"""`perfmodel validate campaign`: a rented hour turned into evidence.

`plan` says what is measured and in which order, `guide` what a unit of it will take and where a verdict turns, `work`
does one unit, `worker` in a process that may be killed, `ledger` keeps the records, `run` goes through the plan within
a budget, `finish` fits and checks, `page` and `show` tell. `paper` is `perfmodel validate paper`.
"""
