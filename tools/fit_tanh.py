"""Fits tanh by sines on intervals: writes csrc/kernels/common/tanh_sines.h.

    python tools/fit_tanh.py [--check] [--output FILE]

For |x| <= X

    tanh x  =  slope x + sum_m amplitude[m] sin(frequency[m] x) + error(x)

with `terms` sines, frequencies free. The fits minimise the largest error (weights raised where it is large: Lawson,
Contributions to the theory of linear least maximum approximation, 1961), with a little of the error of the derivative,
by Levenberg and Marquardt's method over the frequencies; amplitudes are linear least squares. A fit begins with that of
the next larger interval, its frequencies scaled, so that neighbours are of one family.

Needs NumPy and SciPy. --check only measures what the file says of its errors.
"""

import argparse
import concurrent.futures
import pathlib
import re
import sys

import numpy as np
from scipy.optimize import least_squares

HEADER = pathlib.Path(__file__).resolve().parents[1] / "csrc/kernels/common/tanh_sines.h"
TERMS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
MOST_TERMS = max(TERMS)
STEPS_PER_OCTAVE = 8  # of the intervals
LEAST_ERROR, MOST_ERROR = 1e-5, 8e-3  # of the fits that are kept
WEIGHT_OF_DERIVATIVE = 0.15

TOP = """\
#pragma once

// Written by tools/fit_tanh.py, which says what it is.
namespace torch_selfattn::kernels {

// tanh x = slope x + sum_m amplitude[m] sin(frequency[m] x) for |x| <= limit.
struct TanhSines {
  int terms;
  float limit;
  float error;             // the largest
  float derivative_error;  // root of the mean of its square
  float slope;
  float frequency[%d];
  float amplitude[%d];
};

// By terms, then by limits.
inline constexpr TanhSines kTanhSines[] = {
"""
BOTTOM = """\
};

}  // namespace torch_selfattn::kernels
"""


def errors(limit, slope, frequency, amplitude):
    """Largest error and root mean square of the derivative's, on many points."""
    x = np.linspace(0.0, limit, 20001)
    phase = np.outer(x, frequency)
    value = slope * x + np.sin(phase) @ amplitude
    derivative = slope + np.cos(phase) @ (frequency * amplitude)
    tanh = np.tanh(x)
    return np.abs(value - tanh).max(), np.sqrt(np.mean((derivative - (1 - tanh**2)) ** 2))


def fit(limit, frequency):
    """(largest error, frequencies, amplitudes, slope) from the given first guess."""
    x = limit * np.sin(np.linspace(0.0, np.pi / 2, 600))
    tanh = np.tanh(x)
    wanted = np.concatenate([tanh, 1 - tanh**2])

    def solve(frequency, weights):
        phase = np.outer(x, frequency)
        values = np.column_stack([np.sin(phase), x])
        slopes = np.column_stack([np.cos(phase) * frequency, np.ones_like(x)])
        rows = np.concatenate([weights, WEIGHT_OF_DERIVATIVE * weights])
        matrix = rows[:, None] * np.concatenate([values, slopes])
        solution = np.linalg.lstsq(matrix, rows * wanted, rcond=None)[0]
        return solution, matrix @ solution - rows * wanted, values @ solution - tanh

    weights = np.ones_like(x)
    best = None
    for _ in range(14):
        frequency = np.sort(
            np.abs(
                least_squares(
                    lambda f, w=weights: solve(np.abs(f), w)[1],
                    frequency,
                    max_nfev=40,
                    x_scale=np.maximum(frequency, 0.1),
                ).x
            )
        )
        solution, _, difference = solve(frequency, weights)
        difference = np.abs(difference)
        if best is None or difference.max() < best[0]:
            best = difference.max(), frequency.copy(), solution[:-1], solution[-1]
        weights = weights * np.sqrt(difference / difference.max() + 0.02)
        weights /= weights.max()
    return best


def fits_of(terms):
    """Those of so many terms that are kept: (terms, limit, slope, frequencies, amplitudes), by limits."""
    frequency = before = None
    found = []
    for step in range(5 * STEPS_PER_OCTAVE, -1, -1):
        limit = 2 ** (step / STEPS_PER_OCTAVE)
        harmonics = np.arange(1, terms + 1) * np.pi / limit
        if frequency is None:
            guesses = [harmonics * f for f in (0.87, 0.95, 1.05, 1.2, 1.4)]
        else:
            guesses = [frequency * (before / limit) ** p for p in (0.5, 0.8, 1.0)]
        error, frequency, amplitude, slope = min((fit(limit, g) for g in guesses), key=lambda r: r[0])
        before = limit
        if error < LEAST_ERROR:
            break
        if error <= MOST_ERROR:
            found.append((terms, *(np.asarray(x, dtype=np.float32) for x in (limit, slope, frequency, amplitude))))
    return found[::-1]


def number(x):
    text = np.format_float_positional(np.float32(x), unique=True, trim="0")
    return text + "f"


def entry(terms, limit, slope, frequency, amplitude):
    error, derivative = errors(*(np.asarray(x, dtype=np.float64) for x in (limit, slope, frequency, amplitude)))
    lists = [", ".join(number(v) for v in values) for values in (frequency, amplitude)]
    head = ", ".join([str(terms), number(limit), f"{error:.2e}f", f"{derivative:.2e}f", number(slope)])
    return f"    {{{head},\n     {{{lists[0]}}},\n     {{{lists[1]}}}}},\n"


def check(path):
    """Whether every error that the file states is what it is on many points."""
    text = path.read_text()
    pattern = r"\{(\d+), ([^{}]*),\s*\{([^{}]*)\},\s*\{([^{}]*)\}\}"
    rows = re.findall(pattern, text)
    floats = lambda list_of: np.array([float(v.rstrip("f")) for v in list_of.replace("\n", " ").split(",")])
    for terms, head, frequency, amplitude in rows:
        limit, stated, stated_derivative, slope = floats(head)
        frequency, amplitude = floats(frequency), floats(amplitude)
        error, derivative = errors(limit, slope, frequency, amplitude)
        if len(frequency) != int(terms) or len(amplitude) != int(terms):
            sys.exit(f"fit_tanh: {terms} terms up to {limit:.3f}: wrong number of terms")
        if abs(error / stated - 1) > 0.02 or abs(derivative / stated_derivative - 1) > 0.02:
            sys.exit(f"fit_tanh: {terms} terms up to {limit:.3f}: error {error:.2e} (stated {stated:.2e})")
    print(f"{len(rows)} fits: errors as stated")
    return len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, default=HEADER)
    options = parser.parse_args()
    if options.check:
        sys.exit(0 if check(options.output) > 0 else "fit_tanh: no fits found")
    body = []
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for found in pool.map(fits_of, TERMS):
            body += [entry(*row) for row in found]
            print(f"{found[0][0]} terms: {len(found)} fits, up to {found[-1][1]:.2f}", flush=True)
    options.output.write_text(TOP % (MOST_TERMS, MOST_TERMS) + "".join(body) + BOTTOM)


if __name__ == "__main__":
    main()
