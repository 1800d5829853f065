"""Service names: answers from the plan, everything else forwarded to the upstreams, with a cache."""
