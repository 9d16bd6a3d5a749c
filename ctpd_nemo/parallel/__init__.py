"""All that touches Megatron-Core's global state, and the Lightning strategy on top of it.

``cpu`` lets Megatron-Core run where there is no GPU, ``layout`` builds the process groups, ``layers`` chooses the
transformer layer, ``optimizer`` and ``checkpoint`` wrap Megatron's own, and ``strategy`` hands all of it to Lightning.
"""
