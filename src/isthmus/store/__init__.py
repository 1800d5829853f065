"""Where the model comes from: a watched directory of manifests, and the offline copy of what was read last.

Reads and reports; never decides. A broken file keeps the last good state.
"""
