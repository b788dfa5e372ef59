"""Make arithmetic with written steps, digit by digit from the right."""

from __future__ import annotations

from random import Random

from .turns import Turn, typed
from .words import FRUITS, NAMES, OBJECTS, plural


def number(rng: Random, digits: int) -> int:
    """Draw a number with that many digits."""
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def operand(rng: Random) -> int:
    """Draw a number of one to three digits, two being most frequent."""
    return number(rng, rng.choice([1, 2, 2, 2, 3, 3]))


def add_steps(a: int, b: int) -> str:
    """Write the column addition: `7+5=12, 1+2+1=4`."""
    width = max(len(str(a)), len(str(b)))
    x, y, carry, steps = str(a).zfill(width), str(b).zfill(width), 0, []
    for p, q in zip(reversed(x), reversed(y), strict=True):
        total = int(p) + int(q) + carry
        steps.append(f"{p}+{q}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return ", ".join(steps)


def subtract_steps(a: int, b: int) -> str:
    """Write the column subtraction with loans named: `2-7: borrow, 12-7=5, 8-4-1=3`."""
    x, y, loan, steps = str(a), str(b).zfill(len(str(a))), 0, []
    for p, q in zip(reversed(x), reversed(y), strict=True):
        minus = f"-{q}" + ("-1" if loan else "")
        rest = int(p) - int(q) - loan
        loan = int(rest < 0)
        steps.append(f"{p}{minus}: borrow, {int(p) + 10}{minus}={rest + 10}" if loan else f"{p}{minus}={rest}")
    return ", ".join(steps)


def multiply_steps(a: int, b: int) -> str:
    """Write the column multiplication by one digit, the carry added digit by digit: `5*8=40, 7*8=56, 6+4=10, 5+1=6`."""
    carry, steps = 0, []
    for p in reversed(str(a)):
        product = int(p) * b
        tens, ones = divmod(product, 10)
        steps.append(f"{p}*{b}={product}")
        if carry:
            over = (ones + carry) // 10
            steps += [f"{ones}+{carry}={ones + carry}", f"{tens}+{over}={tens + over}"]
        carry = (product + carry) // 10
    return ", ".join(steps)


def divide_steps(b: int, quotient: int) -> str:
    """Go up the table of the divisor until the quotient is found: `8*1=8, 8*2=16, 8*3=24`."""
    return ", ".join(f"{b}*{i}={b * i}" for i in range(1, quotient + 1))


def worked(question: str, verb: str, steps: str, result: int, answer: str, easy: bool) -> Turn:
    """Put the steps into the thought, and for instant mode before the answer unless the sum is easy."""
    return Turn(question, f"{verb}: {steps}. So it is {result}.", answer, None if easy else f"{steps}, so {answer}")


def add(rng: Random) -> Turn:
    """Ask for a sum."""
    a, b = operand(rng), operand(rng)
    q = rng.choice(
        [f"what is {a} + {b}", f"what is {a} + {b}", f"{a} + {b}", f"{a}+{b}", f"add {a} and {b}",
         f"what is {a} plus {b}",
         f"{a} plus {b}", f"how much is {a} + {b}", f"calculate {a} + {b}", f"{a}+{b}=", f"what is {a}+{b}",
         f"how much is {a} plus {b}", f"compute {a} + {b}", f"what is the sum of {a} and {b}", f"{a} and {b} together",
         f"can you add {a} and {b}", f"{a} + {b} ="]
    )  # fmt: skip
    answer = f"{a} + {b} = {a + b}"
    return worked(typed(rng, q), f"I add {a} and {b} from the right", add_steps(a, b), a + b, answer, max(a, b) < 10)


def subtract(rng: Random) -> Turn:
    """Ask for a difference that is not negative."""
    a, b = sorted((operand(rng), operand(rng)), reverse=True)
    q = rng.choice(
        [f"what is {a} - {b}", f"what is {a} - {b}", f"{a} - {b}", f"{a}-{b}", f"subtract {b} from {a}",
         f"what is {a} minus {b}", f"{a} minus {b}", f"how much is {a} - {b}", f"calculate {a} - {b}", f"{a}-{b}=",
         f"take {b} from {a}", f"compute {a} - {b}", f"what is the difference of {a} and {b}"]
    )  # fmt: skip
    answer = f"{a} - {b} = {a - b}"
    verb = f"I take {b} from {a} from the right"
    return worked(typed(rng, q), verb, subtract_steps(a, b), a - b, answer, max(a, b) < 10)


def multiply(rng: Random) -> Turn:
    """Ask for a product with one digit."""
    a, b = number(rng, rng.choice([1, 1, 2, 2])), number(rng, 1)
    x, y = (a, b) if rng.random() < 0.7 else (b, a)
    q = rng.choice(
        [f"what is {x} * {y}", f"{x} * {y}", f"{x}*{y}", f"multiply {x} by {y}", f"what is {x} times {y}",
         f"{x} times {y}",
         f"{x} x {y}", f"calculate {x} * {y}", f"how much is {x} times {y}", f"what is {x} x {y}", f"compute {x} * {y}"]
    )  # fmt: skip
    answer, big, small = f"{x} * {y} = {x * y}", max(x, y), min(x, y)
    verb = f"I multiply {big} by {small} from the right"
    return worked(typed(rng, q), verb, multiply_steps(big, small), x * y, answer, big < 10)


def divide(rng: Random) -> Turn:
    """Ask for a quotient of the times tables."""
    b, c = rng.randint(2, 9), rng.randint(1, 10)
    a = b * c
    q = rng.choice(
        [f"what is {a} / {b}", f"{a} / {b}", f"divide {a} by {b}", f"what is {a} divided by {b}", f"{a}/{b}"]
    )
    head, answer = f"I look for {a} in the table of {b}: {divide_steps(b, c)}", f"{a} / {b} = {c}"
    return Turn(typed(rng, q), f"{head}. So it is {c}.", answer, f"{head}, so {answer}")


def word_problem(rng: Random) -> Turn:
    """Tell of someone who gains or loses things, and ask for the count."""
    who, things = rng.choice(NAMES), plural(rng.choice(OBJECTS[:8] + FRUITS))
    a, b = rng.randint(2, 60), rng.randint(2, 40)
    gains = rng.random() < 0.5 or b >= a
    result = a + b if gains else a - b
    verb = rng.choice(["gets", "buys", "finds"] if gains else ["loses", "gives away", "sells", "eats"])
    more = " more" if gains else ""
    ask = rng.choice(
        [f"how many {things} does {who} have now", f"how many {things} does {who} have"]
        + ([] if gains else [f"how many {things} are left", "how many are left"])
    )
    q = f"{who} has {a} {things} and {verb} {b}{more}. {ask[0].upper() + ask[1:]}"
    steps = add_steps(a, b) if gains else subtract_steps(a, b)
    head = f"I add {a} and {b} from the right" if gains else f"I take {b} from {a} from the right"
    answer = f"{who} has {result} {things} {'now' if gains else 'left'}."
    return Turn(typed(rng, q, polite=False), f"{head}: {steps}. So it is {result}.", answer, f"{steps}, so {answer}")


def even_or_odd(rng: Random) -> Turn:
    """Ask whether a number is even."""
    a = operand(rng)
    q = rng.choice([f"is {a} even", f"is {a} odd", f"is {a} even or odd", f"is the number {a} even"])
    return Turn(typed(rng, q), f"The last digit of {a} is {a % 10}.", f"{a} is {'odd' if a % 2 else 'even'}.")


def count(rng: Random) -> Turn:
    """Ask to count from one number to another, upwards or now and then downwards."""
    a = rng.choice([1, 1, 1, rng.randint(0, 40)])
    b = a + rng.randint(3, 12)
    if rng.random() < 0.2:
        q, numbers = f"count down from {b} to {a}", range(b, a - 1, -1)
    else:
        q = rng.choice([f"count from {a} to {b}", f"count to {b}"] if a == 1 else [f"count from {a} to {b}"])
        numbers = range(a, b + 1)
    return Turn(typed(rng, q), f"I count from {numbers[0]} to {numbers[-1]}.", ", ".join(map(str, numbers)))
