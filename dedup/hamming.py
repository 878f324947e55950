"""What a Hamming join is: the partners of a row as sorted keys, and the join that compares every pair.

A partner is one number, so that sorting partners puts the earliest row first and, for one row, its best orientation:
row number, upright before turned, distance, orientation. Knows nothing of images.
"""

import numpy as np

BITS = 256  # of a PDQ code
KEY_BITS = 12
TURNED = 1 << 11
NOBODY = np.iinfo(np.int64).max  # the key of no partner
INVERSE = np.array([0, 3, 2, 1, 4, 5, 6, 7], np.int32)  # of r0 r90 r180 r270 m0 m90 m180 m270


def pack(row: np.ndarray, orientation: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Keys int64 of partners: int64 row numbers, orientation 0 … 7, distance 0 … 255."""
    turned = np.where(orientation != 0, TURNED, 0)
    return (row << KEY_BITS) | turned | (distance.astype(np.int64) << 3) | orientation


def unpack(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers int64, orientation int32, distance int32."""
    return key >> KEY_BITS, (key & 7).astype(np.int32), ((key >> 3) & 0xFF).astype(np.int32)


def join_brute_force(words: np.ndarray, radius: int, limit: int) -> np.ndarray:
    """uint64 (n, 8, 4) codes → int64 (found, 2): j and the keys of its first `limit` partners i < j, ascending.

    The eight codes of j are compared with the upright code of i.
    """
    parts = [np.empty((0, 2), np.int64)]
    upright = np.ascontiguousarray(words[:, 0].T)  # (4, n)
    for j in range(1, len(words)):
        distance = np.zeros((8, j), np.uint16)
        for word, others in zip(words[j].T, upright, strict=True):  # numpy reduces short axes slowly
            distance += np.bitwise_count(word[:, None] ^ others[:j])
        orientation, i = np.nonzero(distance <= radius)
        keys = np.sort(pack(i, orientation, distance[orientation, i]))
        best = keys[np.diff(keys >> KEY_BITS, prepend=-1) > 0][:limit]
        parts.append(np.stack([np.full(len(best), j), best], axis=1))
    return np.concatenate(parts)
