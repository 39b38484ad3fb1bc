"""The watching room: flag probabilities in, decisions out. One response at a time, no engine, standard library only.

`monitor` makes scores of probabilities, `thresholds` says where an alarm begins, `policy` what an alarm leads to;
`session` drives one response with the three.
"""
