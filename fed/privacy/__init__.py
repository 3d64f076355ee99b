"""Secure sums: the server learns the sum of its clients' vectors, and of no vector anything else.

Pairwise masks by Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation for Privacy-Preserving
Machine Learning"), the protocol against an active adversary; docs/privacy.md says what it protects
from whom. State machines without sockets, threads or clocks; messages are bytes:

    terms            what server and clients have in common before an attempt
    client           the client's five answers, server the server's five steps
    client_memory    what a client keeps, so that it gives no second answer after a restart
    client_checks    what a client believes of what the server sends
    unmasking        what the server believes of the last answers, and the masks that they tell
    messages         dataclasses; envelope has the one form in which they travel
    strict_json      JSON from others
    derived_keys     the keys and commitments that two sides derive alike
    secret_shares    Shamir's secret sharing
    keys             signatures, key agreement, ciphers
    masks            a key stretched to the length of a vector
    layout           tensors and a weight as one vector
    fixed_point      numbers as integers, whose sums are exact
"""
