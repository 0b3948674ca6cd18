"""Numbers, durations and times as the pages write them."""

from datetime import datetime


def format_percent(value: float | None, decimals: int = 1) -> str:
    """A fraction in per cent, without the sign, `0.613` -> `61.3`; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{decimals}f}".replace("-", "−")


def format_points(value: float | None) -> str:
    """A difference of fractions in percentage points with its sign, `0.034` -> `+3.40`."""
    return "–" if value is None else f"{100 * value:+.2f}".replace("-", "−")


def format_count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def format_duration(seconds: float) -> str:
    """Seconds as people say them: `8.2 s`, `4 min 12 s`, `1 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_time(iso: str) -> str:
    """An ISO time to the minute, with its zone where it names one."""
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M %Z").strip()


_PREFIXES = ("", " k", " M", " G", " T", " P", " E")


def format_large(value: float) -> str:
    """A count to three digits with its prefix, `1_083_000` -> `1.08 M`."""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{_PREFIXES[power]}"
