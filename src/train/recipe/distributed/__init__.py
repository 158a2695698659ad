"""What the keys of several processes mean.

``deepspeed_config`` reads DeepSpeed's files, ``sharding`` says what the options of FSDP mean
together, ``groups`` what goes with processes that share a batch, ``optimizers`` which of them can
step shares, and ``conflicts`` which keys do not go with each other.
"""
