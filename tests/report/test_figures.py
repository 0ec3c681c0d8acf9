import numpy as np

from vit_jax.report import figures


def test_thinning_keeps_spikes_ends_and_gaps():
    ys = [0.0] * 10_000
    ys[1234], ys[7000], ys[5000:5100] = 9.0, -9.0, [None] * 100
    xs, kept = figures.thin(range(10_000), ys, limit=200)
    assert len(xs) <= 200
    assert (xs[0], xs[-1]) == (0, 9999)
    assert xs == sorted(xs)
    values = dict(zip(xs, kept, strict=True))
    assert values[1234] == 9.0
    assert values[7000] == -9.0
    assert None in kept


def test_few_points_stay_as_they_are():
    assert figures.thin([1, 2], [None, 3.0], limit=2) == ([1, 2], [None, 3.0])


def test_names_are_no_markup_to_plotly():
    curve = figures.Curve("<b>x</b> & co", 0, [1], [2.0])
    assert figures.curves([curve], y="loss")["data"][0]["name"] == "&lt;b&gt;x&lt;/b&gt; &amp; co"


def test_confusion_is_in_shares_of_the_true_class():
    matrix, totals = np.array([[3, 1], [0, 0]]), np.array([5, 0])  # one went to a third class
    made = figures.confusion(matrix, totals, ["a", "b"], ["a", "b"])["data"][0]
    assert made["z"] == [[0.6, 0.2], [0.0, 0.0]]
    assert made["customdata"][0][1] == ["a", "b", 1]


def test_what_does_not_change_is_not_shown_up_to_its_double():
    flat = figures.curves([figures.Curve("a", 0, [1, 2], [1.0, 1.0])], y="top5", percent=True)
    assert flat["layout"]["yaxis"]["range"] == [0.95, 1.05]
    curve = figures.Curve("a", 0, [1, 2], [0.9, 1.0])
    assert "range" not in figures.curves([curve], y="top5", percent=True)["layout"]["yaxis"]


def test_many_curves_have_fewer_points_each():
    found = [figures.Curve(str(n), n, range(50_000), [1.0 * n] * 50_000) for n in range(30)]
    drawn = figures.curves(found, y="loss")["data"]
    assert sum(len(trace["x"]) for trace in drawn) <= figures.MAX_POINTS
    assert all(trace["x"][-1] == 49_999 for trace in drawn)


def test_the_checkpoints_of_a_run_are_joined_from_the_cheapest():
    points = [("a @ 2", 0, 20.0, 0.9), ("b @ 2", 1, 300.0, 0.7), ("a @ 1", 0, 10.0, 0.8)]
    found = [figures.Point(*point, low=0.1) for point in points]
    made = figures.scatter(found, x="training time (s)", y="top1", percent=True)
    one, other = made["data"]
    assert (one["x"], one["y"], one["text"]) == ([10.0, 20.0], [0.8, 0.9], ["a @ 1", "a @ 2"])
    assert one["error_y"]["array"] == [0, 0]  # no upper end is known
    assert other["x"] == [300.0]
    assert made["layout"]["xaxis"]["type"] == "log"
    near = figures.scatter(found[::2], x="training time (s)", y="top1", percent=True)
    assert "type" not in near["layout"]["xaxis"]


def test_a_head_whose_distance_is_not_finite_is_left_out():
    points, means = figures.by_layer([[4.0, None], [None, None]])["data"]
    assert points["y"] == [4.0]
    assert means["y"] == [4.0, None]
