"""Packet marks: which bits are ours. Every match and every change uses a mask, so other owners' bits stay as they are.

Known owners: kube-proxy 0x4000 and 0x8000, Cilium 0xf00, Calico 0xffff0000, Tailscale 0xff0000. Ours is the lowest
byte: the upper half says what encryption does with the packet, the lower half what interception does with it.
"""

ENCRYPTION_MASK = 0xF0
INTERCEPTION_MASK = 0x0F

# Set on every socket of ours that connects or answers: such a packet is never intercepted again.
OWN = 0x01
# Set on a packet that goes to a transparent socket of this node: an ip rule sends it to our table, which says "local".
TO_SOCKET = 0x02
# Set on a socket of ours that connects from a client's address: answers to it must come back to us. Has the OWN bit.
FROM_CLIENT = 0x05
