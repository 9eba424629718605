"""Outputs of other simulators, read as simulated Runs so that they are judged as ours are: one file per format.

Peers number their requests instead of keeping names; `build.NUMBERED` writes that down for `kvtwin.validate.peers`.
"""
