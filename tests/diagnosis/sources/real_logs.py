"""Logs that trackers themselves wrote: four steps with a loss of 2.9, 2.5, NaN and 2.25, and an evaluation of 2.4.

WANDB is run-*.wandb of wandb 0.31.0 in offline mode, TENSORBOARD an event file of tensorboard 2.21's EventFileWriter.
"""

from __future__ import annotations

import base64
import zlib


def _bytes(packed: bytes) -> bytes:
    return zlib.decompress(base64.b64decode(packed))


WANDB = _bytes(
    b"eNrVlk1s3EQUxzP76c4m6WaSbBJXQFk1VDTE9Yw9/qAHCieEoJceKpDAeG1v1qm9u3i9bUqEihYOkEJAICGVC8cKEEIcUCshemgP"
    b"0IJaIkBCQkLpkQNUikBCgATjbEp3y7pZeik5evzevPf7/9+M5v5D9zx05ezAqZWV3x8bABw4NwghVyrXTavhN94D+6AO94qChAVx"
    b"BtOyZpUsqmEbW9QqW4oj4bKilWStZNtYshyL2DaxUEYUVFEQfxn+8sxfbM9ECwwXB22xXJeah4/NiaHZVWQJfA+uf/GgXnwNwCGY"
    b"MY6aVbvUAonF5+AEHPIcM6i61TkjMEOnBdKsgIjh3XBH3QkM2zniWo4RBqZbNUpmaFWMhvssCwMyHIHQNxcMz6nOhRW2HRFhgS3V"
    b"bMczwmN1FpQtep7pm0VWBtaaYb0ZGrYbtABXbH8V51OVWiNcAjlu7Z0Pv8vkz6x+NPs2mObTO8HzABQzkoCxoO7JtIWaH/TcanNh"
    b"dkFTDEXeXz9xkmcqJEkBjsF84DzTdAPHd6phQwgXwkmwtJrYp7CAVJcqT/S3+8OJmYMzLDnN74bjaEMzlA2a1dD1I34ChyFndHzr"
    b"a6e4Sywjw18AcAzl1jXb69RrFhMnJQqEwgk00l6d82ol0zMaoVNnqRROI2hE+zRC02crBdaWTnVJIbKsEKwoInVmRB1Ooo6KOSLI"
    b"uoYVrGIZ5lD62m4iRAi2y3i1RqMFkkTQWentG6UD0zaqtcBnP0SBwjvQ6EZwrzm475HT337FoLLoC7BJ6NZhRgPz7/+JIne5vt1d"
    b"KzSXIyG28UyI0RtI14Wc7AmawOJNSSVJ0hXck5SKVNWJokqdpLgHKY13964Yy7KRZaJKP/75rdVvGBZEl8HWJOhpBkpwYGrnZ3si"
    b"j3N9e7xi/3Qy8ngw8vjOmLqZ9bq017Sr8UNAN5FQ1TCJk1AjEpVxp4TkXxIeMA/ESuhfHbo38ngo8vi/JP6/NWAeJ1759EQp8ni4"
    b"b4/f3L/IXWYZ2/mLAI7c0D+bzZjmyWZnQKdKfPOypMpdZ0BiU9vlQ4q078pbOgSEnl956sGvGVUeXQKbBm8ZbOZw8smg8m7k8Ejf"
    b"Dk+d9ZaPswzELzLSbc4R07t+0ci3SiqLukZjSRVFkZVOUvmTP3594AXWxSg6fhu7YAqmPr+660qk4FjfCj568PXfXmYZ4/yLAO64"
    b"Nk3tN+A/YUlJIDfB2NWNMd6NQWQllkKlhF0iHRR0eTb3wausnwJ6CXT9uE3NMVXTF5JP/6ixnia6H5e7+Wwe9PG8TJ27CCJTJvs2"
    b"5fEfwOlpljG1/uinzlG3IsuWfdh3ujp4AyTyib8BIPpo8w=="
)
TENSORBOARD = _bytes(
    b"eNrzYICAf5M85nJGPHD6+/nQLUcp3qSixMw8Pdey1LwSK6MgPS6dktS84vyipPzEohS94tLc3MSiSr3yosyS1CK9VJCq+LTMnNR4"
    b"iMiK0onmyVBzN2YL39RK5IrnEkwsSi/WL0mtKImH6ndy4GAXYnCyqlbKSU0sysvMS48vSixJVbJSMNAzMDDUUVAqSC2KT0kty0xO"
    b"jS8BOSg+KbEkOSO+OLMKpMqk1ouDi42LBWSmz1u3egWolZpvVwZwQpgf7AVYtYS5BLm4wPr1c/KLi0VnzbR0SNm1ZpsqVP2rPWaf"
    b"kdVLcIlx8UPUpxclpsTn5RfligIl7RcYbRPShGoy/x/PgKxJhkuKSxhqCbJvRPOFmq2u3v6krAjVyFj95huyRhEuIS5uiMbUgvzk"
    b"DKBNDXZx8WxiWLzD4CDAheEdBgYFBx8GwcNYvANWj9M7LzKiJ2PxDlgTTu8sm+1i5ZGb8ACLd8AasXiHwT5qzr0zWLzD4SDAj8U7"
    b"B+p3Fxxlx+IdsHqc3jnrl5eAxTtgTXhih9nKcXuHFhbvgDVi8Y6DfejuaZpYvCPgICCCxTsCDg9nTr6KxTtg9Ti9I+8UNQWLd8Ca"
    b"8CU2y+09X1Zi8Q5YI7bEZq/medJGHqoh0NtFAqpBCaRBiEuAizO1LDEHlnUkHbZ1SH8AAGY7C14="
)
