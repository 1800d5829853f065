"""What the node should do, and why. Pure: model in, desired state and verdicts out.

Every decision about a packet, a name or a path is one function here, and each says which rule and which object decided.
Time and randomness come in as arguments.
"""
