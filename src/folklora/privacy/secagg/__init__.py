"""Secure aggregation: the server learns the sum of a round's vectors, and of no single one anything.

The protocol is that of Bonawitz et al. ("Practical secure aggregation for privacy-preserving machine learning", CCS
2017, figure 4 without the parts against an active server), on vectors of whole numbers modulo 2^32. In one round, with
members u, v, ... and a threshold t:

1. Keys. u sends two public keys, one to be written to with and one to make masks with.
2. Shares. Everybody is told everybody's keys (the *roll*). u makes a polynomial of degree t - 1 through each of two
   secrets, that of its mask key and that of a mask of its own, and sends each v its points, encrypted for v. What any
   t - 1 know of a secret is nothing [Shamir 1979].
3. Masked upload. ``y_u = x_u + own mask of u + sum over v > u of mask(u, v) - sum over v < u of mask(u, v)``, where
   ``mask(u, v)`` is known to u and v only, and follows from who they are and what they were told, too: it is another
   one for whoever shows u's key as its own, or was told another thing. In the sum of all y the pairs' masks cancel.
4. Opening. Those whose uploads arrived are asked for points: of the own mask of each upload that arrived, of the mask
   key of each that did not. With t of each the server takes the own masks, and the pairs' masks that found no partner,
   off the sum. Nobody ever tells both of one member, and t is more than half of the round's members, so no t of them
   do: each upload stays masked by one of the two. Members take part in no session that is larger than a round.

All of u's answers are functions of its secret, of the session (16 bytes that the server draws for each attempt at a
round) and of what it was told, so an order that comes again is answered with the same bytes, and another attempt has
other keys. What a member has opened it must remember (`folklora.federation.masked`): the one who opens the same data
for all, and again for all but one, has told that one's.

What is taken from where. Keys are X25519, derivations HKDF-SHA256, points travel in ChaCha20-Poly1305, and masks are
ChaCha20's keystream: all of them `cryptography`'s. Flower's own primitives are not used. Its masks come from NumPy's
Mersenne Twister behind a seed that is folded to 32 bits (`secaggplus_utils.pseudo_rand_gen`, flwrlabs/flower issue
7522), which anybody can search through; its Shamir sharing (PyCryptodome's) draws a new polynomial at each call, so
that shares of a repeated order do not belong together; its quantisation rounds by NumPy's global generator. Its
``SecAggPlusWorkflow`` drives FedAvg over Flower's own messages in one go, and has no place for orders that are repeated
or for a round that is resumed. Of SecAgg+ [Bell et al., CCS 2020] the sparse graph is left out: a round of n members
costs each of them about 320 n bytes and 4 n key agreements, which is little up to some hundreds.

Points are in the field of 2^127 - 1, and secrets are numbers of it: 127 bits, as strong as X25519 itself. For each
point its maker tells the server a SHA-256 (16 bytes of it), so that a wrong point is found out and who sent it.

`folklora.privacy.secagg.party` is a member, `desk` the server, `pieces` what both compute, `wire` what travels.
"""
