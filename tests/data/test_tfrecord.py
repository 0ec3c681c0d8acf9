import numpy as np
import pytest

from tests.data.tfrecords import frame, slow_crc32c
from vit_jax.data.tfrecord import crc32c, read_tfrecord


@pytest.mark.parametrize(
    ("data", "expected"),  # RFC 3720, appendix B.4
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (b"\0" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_known_sums(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1019, 1020, 1021, 2048, 5000, 70_001])
def test_sums_of_any_size_equal_those_taken_byte_by_byte(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == slow_crc32c(data)


def test_reads_every_record(tmp_path):
    records = [b"", b"a", b"some more", bytes(5000)]
    path = tmp_path / "file"
    path.write_bytes(b"".join(map(frame, records)))
    assert list(read_tfrecord(path)) == records


@pytest.mark.parametrize("kept", [5, 14, -3])
def test_a_cut_file_is_an_error_that_names_it(tmp_path, kept):
    path = tmp_path / "file"
    path.write_bytes((frame(b"first") + frame(b"second"))[:kept])
    with pytest.raises(OSError, match=r"file is cut off in the record at byte \d+"):
        list(read_tfrecord(path))


@pytest.mark.parametrize("place", [0, 9, 13, -2])
def test_a_flipped_bit_is_an_error(tmp_path, place):
    damaged = bytearray(frame(b"contents"))
    damaged[place] ^= 1
    (tmp_path / "file").write_bytes(damaged)
    with pytest.raises(OSError, match="is damaged in the record at byte 0"):
        list(read_tfrecord(tmp_path / "file"))


def test_the_frame_is_tensorflows():
    # What tf.io.TFRecordWriter of TensorFlow 2.21 writes for b"abc".
    assert frame(b"abc").hex() == "0300000000000000b099490e6162636e57f121"
