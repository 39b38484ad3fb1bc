"""The watching room: flag probabilities in, decisions out. One response at a time, no engine, standard library only.

`monitor` turns probabilities into scores, `thresholds` says at which score an alarm is raised, `first_token` can decide
before the response, `policy` maps alarms to actions; `session` runs one response through all of them, and `replay` a
recorded response under other thresholds or policies.
"""
