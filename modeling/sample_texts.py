"""Texts of many kinds: what a model makes of them is taken as typical of it (`memory_encoding`)."""

SAMPLE_TEXTS = (
    "The harbour town lies where the river meets the sea. Its first lighthouse was built in 1762 "
    "and burned down forty years later; the present one, of granite, is 31 metres high. Fishermen "
    "from three villages sell their catch on the quay before sunrise, and in summer a ferry "
    "carries visitors to the islands.",
    "Maria Keller (born 14 March 1921, died 2 November 1998) was a chemist and teacher. She "
    "studied in Vienna and Zurich, worked on catalysts for the production of ammonia, and received "
    "the medal of the academy in 1967. Her brother Paul was a composer; their letters were "
    "published in two volumes.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    result = [total / "
    "width]\n    for old, new in zip(values, values[width:]):\n        total += new - old\n        "
    "result.append(total / width)\n    return result  # one pass, no copies\n",
    '"Did you call them?" she asked.\n"Twice. Nobody answered, so I left a message."\n"Then '
    'we wait," she said, and put the kettle on. Outside, the rain had turned into snow, and the '
    "last bus went by without stopping.",
    "## Installation\n\n1. Download the archive and unpack it.\n2. Run `make install` as an "
    "ordinary user.\n3. Set the option `cache_size = 256` in the file settings.ini.\n\nNote: "
    "versions before 2.4 need Python 3.8. If the service does not start, look into the log and "
    "report the error with its number.",
    "Cells take up glucose through transporters in their membrane. Inside, it is phosphorylated "
    "and broken down in ten steps to pyruvate, which yields two molecules of ATP. When oxygen is "
    "scarce, pyruvate becomes lactate; otherwise it enters the citric acid cycle in the "
    "mitochondria.",
    "| Quarter | Revenue | Costs | Margin |\n| --- | --- | --- | --- |\n| Q1 2023 | 4,120 | 3,075 "
    "| 25.4 % |\n| Q2 2023 | 4,655 | 3,290 | 29.3 % |\n| Q3 2023 | 3,980 | 3,101 | 22.1 % |\nAll "
    "amounts in thousands of euros; the figures have not been audited.",
    "The tenant shall pay the rent in advance, no later than the third working day of each month. "
    "Should the tenant fail to do so for two consecutive months, the landlord may terminate this "
    "agreement by written notice, without prejudice to any claim for damages under section 7.",
    "Le marché ouvre à huit heures. Der Zug nach Hamburg fährt heute von Gleis 7. La biblioteca "
    "cierra los domingos y los días festivos. Il professore spiega la lezione agli studenti. "
    "Поезд прибывает вечером. 東京は日本の首都です。",
    "Question: A train covers 180 km in two hours and a quarter. What is its average speed?\n"
    "Answer: 180 / 2.25 = 80, so the train runs at 80 km/h on average. For x > 0 the function f(x) "
    "= x^2 - 4x + 7 has its least value 3 at x = 2.",
    "The film opened to mixed reviews: critics praised the photography and the score, but found "
    "the second half too long. It earned 48 million dollars in its first week, won two awards at "
    "the festival in Toronto, and was followed by a sequel in 2009, directed by the same team.",
    '{"id": 4821, "name": "sensor-7", "status": "active", "readings": [21.4, 21.6, '
    '22.0], "location": {"lat": 48.2, "lon": 16.37}}\nGET /api/v1/items?limit=20 HTTP/1.1\n'
    "Host: example.org\nERROR 2024-05-11 08:13:02 connection refused after 3 attempts",
)
