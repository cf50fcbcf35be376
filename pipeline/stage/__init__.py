"""A stage worker: one orchestrator's session after another.

A control channel comes in and asks for a session; steps come in on a data channel, pass through the
shard (`step_executor`, or straight through the `decode_lane`) and leave on another. What a session
wrote is zeroed when it ends. It runs on machines of others, so it knows neither text nor
orchestrator nor gateway.
"""
