"""What benchmarks/ring_report.py makes of a trace."""

import ring_report


def event(stream: int, name: str, start: float, microseconds: float) -> dict:
    return {"stream": stream, "name": name, "start": start, "microseconds": microseconds}


def test_time_without_attention_is_told_from_idle_time():
    """From 10 on, which is the second half: attention from 10 to 40 on two streams, and a copy beside it and to 45."""
    before = [event(1, "forward_kernel", start, 1) for start in range(4)]
    later = [
        event(2, "forward_kernel", 20, 20),
        event(1, "forward_kernel", 10, 15),
        event(3, "Memcpy PtoP", 30, 15),
        event(1, "rounded_sum_kernel", 50, 5),
    ]
    lines = [" ".join(line.split()) for line in ring_report.where_time_goes(before + later)]
    assert "35 us 2 x forward_kernel" in lines
    assert "15 us 1 x Memcpy PtoP" in lines
    assert "15 us of 45 without attention" in lines
    assert "5 us of 45 without anything" in lines
    assert ring_report.where_time_goes([]) == ["the trace is empty"]
