"""The text that the tiny base is trained on: all of it can be made again on any machine with Python.

Three parts. `documentation`: docstrings, comments and pydoc topics of Python's standard library. `code`: its source files.
`support`: questions and answers of our own about places that are not the shop of the FAQ (a library, a gym, a railway, ...),
put together from templates by a seeded generator; the same fact is asked in several ways and always answered alike, so that
a model can learn that a paraphrase has the same answer. No sentence of the FAQ that the demo teaches is in it.
"""

from __future__ import annotations

import ast
import io
import pathlib
import pydoc_data.topics
import random
import sysconfig
import tokenize

from qlite.data import format_prompt

SKIPPED_FOLDERS = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings")


def standard_library() -> list[pathlib.Path]:
    """Returns the standard library's own modules, sorted."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py") if not set(path.relative_to(root).parts[:-1]) & set(SKIPPED_FOLDERS))
    return sorted(path for path in paths if path.stat().st_size < 300_000)


def _prose(source: str) -> list[str]:
    """Returns a module's docstrings, each with its name, and its longer comments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 20:
                found.append(f"{getattr(node, 'name', '')}\n{docstring}".strip())
    comment: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment.append(token.string.lstrip("#! ").rstrip())
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if sum(map(len, comment)) > 80:
                found.append("\n".join(comment))
            comment = []
    return found


def documentation_and_code() -> list[tuple[list[str], str]]:
    """Returns for each module of the standard library, and each help topic, its prose (documents) and its source (or "").

    A docstring stands in both, so what is to be held out must be held out of both.
    """
    parts = [([topic], "") for topic in pydoc_data.topics.topics.values()]
    for path in standard_library():
        try:
            source = path.read_text(encoding="utf-8")
            parts += [(_prose(source), source)] if source.strip() else []
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
    return parts


# Each place: what one is there, what one holds there, what one uses, and what one reserves.
PLACES = {
    "library": ("reader", "library card", "book", "study room"),
    "gym": ("member", "membership", "locker", "training session"),
    "museum": ("visitor", "season pass", "audio guide", "guided tour"),
    "railway": ("passenger", "travel card", "ticket", "seat"),
    "bank": ("client", "savings plan", "debit card", "meeting"),
    "clinic": ("patient", "patient file", "prescription", "appointment"),
    "hotel": ("guest", "loyalty card", "room key", "room"),
    "school": ("student", "student card", "textbook", "language course"),
    "restaurant": ("guest", "lunch card", "menu", "table"),
    "post office": ("sender", "post box", "letter", "counter slot"),
    "telephone company": ("subscriber", "contract", "handset", "repair visit"),
    "theatre": ("spectator", "subscription", "programme", "box seat"),
    "swimming pool": ("swimmer", "ten-visit card", "towel", "lane"),
    "car park": ("driver", "parking permit", "barrier card", "parking bay"),
    "software service": ("user", "licence", "workspace", "support call"),
    "town hall": ("resident", "residence permit", "form", "passport interview"),
    "bicycle hire": ("rider", "yearly pass", "bicycle", "cargo bike"),
    "music school": ("pupil", "lesson plan", "violin", "practice room"),
    "garden centre": ("visitor", "bonus card", "plant", "planting workshop"),
    "energy supplier": ("household", "tariff", "meter", "inspection"),
}
# Each topic: ways to ask, and ways to answer. {h} what one holds, {u} what one uses, {b} what one reserves, {o} the place.
TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "apply": (
        ["How do I apply for a {h}?", "How can I get a {h}?", "What do I need to do to obtain a {h}?", "Where can I ask for a {h}?",
         "I would like a {h}. How does that work?", "What is the way to get a {h} at the {o}?"],
        ["Fill in the {h} form at {desk} and bring {paper}. It is ready after {n} {days}.",
         "You can apply for a {h} {online} with {paper}. We confirm it within {n} {days}.",
         "Ask for it at {desk}. Our staff prepare the {h} while you wait, which takes about {n} minutes."]),
    "lost": (
        ["I lost my {h}. What should I do?", "What happens if my {h} is lost?", "My {h} is gone, how do I replace it?",
         "How do I report a lost {h}?", "Can I get a new {h} when I cannot find mine?", "Someone took my {h}. What now?"],
        ["Tell {desk} at once so that we can block the {h}. A new one costs {price}.",
         "Report it {online}. The old {h} stops working immediately and the new one arrives in {n} {days}.",
         "Call us the same day. We replace a {h} once a year without charge, after that for {price}."]),
    "hours": (
        ["When is the {o} open?", "What are the opening hours of the {o}?", "Until what time can I visit the {o}?",
         "Is the {o} open on {weekday}?", "At what time does the {o} close?", "Which hours does the {o} keep?"],
        ["The {o} is open from {weekday} to {weekday2}, {hour} to {evening}.",
         "We open at {hour} every day but {weekday} and close at {evening}.",
         "Our doors are open daily from {hour} until {evening}, and until {n} on {weekday}."]),
    "price": (
        ["How much does a {h} cost?", "What is the price of a {h}?", "Is there a fee for the {h}?", "What do I pay for a {h}?",
         "Tell me the cost of a {h}, please.", "Is the {h} free of charge?"],
        ["A {h} costs {price} a year, and half of that for students.", "The {h} is {price} a month. There is no joining fee.",
         "You pay {price} once. The {h} is then valid for {n} {months}."]),
    "reserve": (
        ["How do I reserve a {b}?", "Can I book a {b} in advance?", "How far ahead can I reserve a {b}?", "Where do I book a {b}?",
         "I want to arrange a {b}. How?", "Is it possible to reserve a {b} by telephone?"],
        ["Reserve a {b} {online} up to {n} {days} before. You get a message with the time.",
         "Call {desk} or write to us. A {b} can be booked {n} {days} ahead.",
         "Choose a free time {online} and confirm. We hold the {b} for {n} minutes."]),
    "cancel": (
        ["How do I cancel a {b}?", "Can I call off my {b}?", "What if I cannot come to my {b}?", "Until when can I cancel the {b}?",
         "I need to cancel my {b}. Is there a charge?", "How can I withdraw from a {b}?"],
        ["You may cancel a {b} until {n} hours before it starts, at no charge. Later it costs {price}.",
         "Use the link in the message that confirmed the {b}. We return what you paid within {n} {days}.",
         "Tell {desk} the day before. If you do not come, we charge {price} for the {b}."]),
    "extend": (
        ["How do I extend my {h}?", "Can I renew the {h}?", "My {h} is about to end. What do I do?", "When must I renew my {h}?",
         "Does the {h} renew itself?", "What is the procedure for renewing a {h}?"],
        ["The {h} renews itself for {n} {months} unless you write to us before.", "Renew it at {desk} with {paper} in the last {n} {days}.",
         "You can extend the {h} {online} twice, each time by {n} {months}."]),
    "stop": (
        ["How do I end my {h}?", "Can I give back my {h} early?", "What notice do I need to end the {h}?", "I want to stop my {h}. How?",
         "Is it possible to leave the {h} before its end?", "How can I terminate a {h}?"],
        ["Write to {desk} {n} {days} before the end of the month. The {h} then stops.",
         "You can end a {h} at any time {online}; the rest of the fee is paid back.",
         "A {h} runs for {n} {months}. After that it ends on the day you choose."]),
    "rules": (
        ["Who may use a {u}?", "How long may I keep a {u}?", "Can every {p} take a {u}?", "For how many days can I have the {u}?",
         "What is the limit for a {u}?", "Is there a time limit on a {u}?"],
        ["Every {p} with a valid {h} may have one {u} for {n} {days}.", "A {u} can be used for {n} hours; after that we ask for it back.",
         "You may keep a {u} for {n} {days} and extend that once at {desk}."]),
    "broken": (
        ["What do I do with a broken {u}?", "My {u} does not work. Who can help?", "The {u} is damaged. What should I do?",
         "How do I report a fault of a {u}?", "Who repairs a {u}?", "I broke a {u}. Do I have to pay?"],
        ["Bring the {u} to {desk}. We repair it within {n} {days} or give you another.",
         "Describe the fault {online}. If we caused it, the repair is free; otherwise it costs {price}.",
         "Leave it where it is and tell {desk}. You get another {u} at once."]),
    "late": (
        ["What happens if I return a {u} late?", "Is there a fine for a late {u}?", "I kept a {u} too long. What does it cost?",
         "How much is the charge for a {u} that comes back late?", "Do I pay for keeping a {u} too long?", "Can you waive the fee for a late {u}?"],
        ["We charge {price} for each day that the {u} is late, and never more than {price2}.",
         "The first {n} {days} are free. After that a late {u} costs {price} a week.",
         "There is no fine, but you cannot take another {u} until the first is back."]),
    "pay": (
        ["How can I pay at the {o}?", "Which means of payment does the {o} take?", "Does the {o} accept cards?", "Can I pay in cash at the {o}?",
         "May I pay by bank transfer?", "What are the ways to pay for a {h}?"],
        ["We take cash and all common cards at {desk}.", "Pay by card or transfer; an invoice comes {online} within {n} {days}.",
         "Only cards are accepted. Larger sums can be paid in {n} parts."]),
    "contact": (
        ["How do I reach the {o}?", "How can I contact the {o}?", "Is there a telephone number for the {o}?", "Where do I write to?",
         "Whom can I speak to at the {o}?", "What is the quickest way to reach a person?"],
        ["Call {phone} from {hour} to {evening}, or ask at {desk}.", "Write to us {online}. An answer comes within {n} {days}.",
         "Our team answers at {phone} every day except {weekday}."]),
    "discount": (
        ["Is there a discount for students?", "Do families pay less?", "Are there lower prices for groups?", "Who gets a discount at the {o}?",
         "Do pensioners get a reduction?", "Can I have a cheaper {h}?"],
        ["Students, pensioners and groups of {n} or more pay {percent} per cent less.",
         "Show {paper} at {desk} and the price drops by {percent} per cent.", "Children under {n} are free; families get {percent} per cent off."]),
    "complain": (
        ["How do I make a complaint?", "Where can I complain about the {o}?", "I am not happy with the service. What can I do?",
         "Who deals with complaints?", "How are complaints handled?", "I wish to report a problem with a {p} or a member of staff."],
        ["Write down what happened and give it to {desk}. The manager answers within {n} {days}.",
         "Send your complaint {online}. Every one is read and answered in {n} {days}.",
         "Talk to {desk} first. If that does not help, an ombudsman decides within {n} {months}."]),
    "address": (
        ["How do I change my address?", "I moved house. Whom do I tell?", "Where can I enter a new address?", "How can I update my details?",
         "Do I have to tell the {o} that I moved?", "My telephone number has changed. What should I do?"],
        ["Change your details {online} or at {desk}. Bring {paper}.", "Send us a short letter with both addresses; we update the {h} in {n} {days}.",
         "Every {p} must report a move within {n} {days}, best {online}."]),
    "gift": (
        ["Can I give a {h} as a present?", "Do you sell vouchers?", "How do I use a voucher?", "Is it possible to buy a {h} for somebody else?",
         "How long is a voucher valid?", "I got a voucher for a {h}. How do I redeem it?"],
        ["Vouchers are sold at {desk} from {price} and are valid for {n} {months}.", "Enter the code of the voucher {online}; the {h} starts the same day.",
         "Yes, a {h} can be a present. We need only the name of the other person."]),
    "data": (
        ["What do you store about me?", "How long do you keep my data?", "Who can see my details?", "Do you pass on my data?",
         "How can I have my data erased?", "Is my information safe with the {o}?"],
        ["We keep the name and address of each {p} for {n} {months} and pass on nothing.",
         "Ask {desk} to erase your data. It is done within {n} {days}.", "Only two members of staff can open the file of a {p}, and each visit is logged."]),
    "account": (
        ["How do I open an account with the {o}?", "Where can I sign up as a {p}?", "I want to register with the {o}. How?",
         "Do I need an account to see my {h}?", "How can I create a login for the {o}?", "What is needed to register as a {p}?"],
        ["Register {online} with your name and email address. You can sign in after {n} minutes.",
         "Ask {desk} for an account and bring {paper}. We send the login within {n} {days}.",
         "You need an account only if you have a {h}. Opening one takes {n} minutes {online}."]),
    "password": (
        ["I cannot remember my password for the {o}.", "How do I reset my password?", "What do I do when I forgot the password?",
         "My login with the {o} does not work any more.", "How can I get a new password?", "Can you unlock my account?"],
        ["Tell {desk} the number of your {h} and choose a new password there.", "Ask for a new password {online}. The message is valid for {n} hours.",
         "After {n} wrong attempts the login is blocked until the next day; {desk} can help sooner."]),
    "delivery": (
        ["How long does the delivery of my {h} take?", "When will my {h} arrive by post?", "Do you send the {h} to my home?",
         "Is shipping of a {h} free?", "Can the {h} be delivered abroad?", "Where is the parcel with my {h}?"],
        ["We send it by post. Delivery takes {n} {days} and costs {price}.", "The parcel comes within {n} {days}; you can track it {online}.",
         "Shipping is free inside the country. To other countries it costs {price} and takes {n} {days}."]),
    "refund": (
        ["Can I get my money back for a {b}?", "How do I ask for a refund?", "When do I receive the refund for my {b}?",
         "I paid twice for a {b}. What now?", "Do you refund a {h} that I do not use?", "How long does it take until my money is back?"],
        ["We refund the full price within {n} {days}, to the card that you paid with.", "Ask for a refund {online} within {n} {days}. A fee of {price} is kept.",
         "Show the receipt at {desk} and you get the money back at once."]),
    "invoice": (
        ["Where do I find the invoice for my {h}?", "Can I have a receipt for the {b}?", "How do I get a bill with tax?",
         "I need an invoice for my company.", "Do you send invoices by post?", "Can you correct the name on an invoice?"],
        ["Invoices are kept {online} for {n} {months}.", "Ask {desk} for a receipt that shows the tax. It is ready in {n} minutes.",
         "Every customer gets the invoice by email within {n} {days} after payment."]),
    "shop": (
        ["Can I buy a {u} in your shop?", "Is the {u} in stock?", "How do I order a {u} from you?", "Do you sell a used {u}?",
         "What does a new {u} cost in the shop?", "When will the {u} be available again?"],
        ["Put the {u} in your basket {online} and go to the checkout. It costs {price}.", "The shop has {n} of them in stock; an order can be collected at {desk}.",
         "It is sold out. New items arrive in {n} {days}, and we tell you by email."]),
    "exchange": (
        ["Can I exchange a {u} that I bought?", "How do I return a {u} to the shop?", "The {u} has the wrong size. What can I do?",
         "May I send the {u} back?", "Is there a warranty on a {u}?", "How long do I have to return an item?"],
        ["Return it within {n} {days} with the receipt and choose another item.", "The warranty lasts {n} {months}. Bring the {u} and the receipt to {desk}.",
         "Print the return label {online} and drop the parcel at any post office within {n} {days}."]),
    "news": (
        ["How do I get your newsletter?", "Can I stop the newsletter?", "How do I unsubscribe from your emails?", "Do you send offers by email?",
         "I receive too many messages from the {o}.", "Where can I subscribe to news of the {o}?"],
        ["Every message has a link at the end that ends the subscription within {n} {days}.", "Subscribe {online}; we write {n} times a year.",
         "Tell {desk} your email address, and choose which offers you want."]),
}  # fmt: skip
SLOTS = {
    "desk": ["the front desk", "the information desk", "the service point", "the office on the first floor", "the entrance"],
    "online": [
        "online",
        "on our website",
        "in the app",
        "by email",
        'with the button "Request" on our page',
        'in the app, under "Service"',
        'in your profile, under "Settings"',
        'through the link "Help" at the foot of any page',
        'with the form "Contact us"',
    ],
    "paper": ["a passport", "an identity card", "a proof of address", "two photographs", "last year's letter"],
    "days": ["days", "working days", "weeks"],
    "months": ["months", "years"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Sunday"],
    "weekday2": ["Thursday", "Friday", "Saturday"],
    "hour": ["seven", "eight", "nine", "ten", "half past nine"],
    "evening": ["five in the afternoon", "six in the evening", "eight at night", "ten at night"],
    "n": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "fourteen", "twenty", "thirty"],
    "price": ["2 euros", "3 euros", "5 euros", "8 euros", "10 euros", "15 euros", "25 euros", "40 euros"],
    "price2": ["50 euros", "60 euros", "80 euros", "100 euros"],
    "percent": ["ten", "fifteen", "twenty", "twenty-five", "thirty", "fifty"],
    "phone": ["555 0101", "555 0134", "555 0162", "555 0188", "555 0190"],
}
#: Places whose documents are kept from training, all of them, to measure on.
HELD_OUT_PLACES = ("music school", "garden centre")
OPENERS = ["", "", "", "", "Hello, ", "Good morning. ", "A question: ", "Please tell me: ", "Excuse me. "]


def _fill(template: str, place: str, slots: dict[str, str]) -> str:
    person, held, used, booked = PLACES[place]
    return template.format(o=place, p=person, h=held, u=used, b=booked, **slots)


def _fact(place: str, topic: str, rng: random.Random) -> tuple[list[str], str]:
    """Returns all ways to ask for a fact, and its one answer."""
    slots = {name: rng.choice(values) for name, values in SLOTS.items()}
    questions, answers = TOPICS[topic]
    return [_fill(question, place, slots) for question in questions], _fill(rng.choice(answers), place, slots)


def support(seed: int = 0, pages: int = 9000) -> tuple[list[str], list[str]]:
    """Returns documents of questions and answers, each already in the prompt template: to train on, and held out.

    First the fixed facts of each place, one question a document. Then pages of made-up facts, on which a question comes
    back in other words with the answer that the page gave before.
    """
    rng = random.Random(seed)
    documents: dict[bool, list[str]] = {False: [], True: []}
    for place in PLACES:
        for topic in TOPICS:
            questions, answer = _fact(place, topic, rng)
            for question in questions:
                at = "" if place in question else rng.choice([f"At the {place}: ", f"About the {place}. "])
                documents[place in HELD_OUT_PLACES] += [
                    f"{format_prompt(at + opener + question)} {answer}" for opener in rng.sample(OPENERS, 3)
                ]
    for _ in range(pages):
        place = rng.choice(list(PLACES))
        facts = [_fact(place, topic, rng) for topic in rng.sample(list(TOPICS), rng.randint(2, 5))]
        rows = [(rng.choice(questions), answer) for questions, answer in facts]
        rows += [(rng.choice(questions), answer) for questions, answer in facts]
        rng.shuffle(rows)
        documents[place in HELD_OUT_PLACES].append(
            "\n\n".join(f"{format_prompt(question)} {answer}" for question, answer in rows)
        )
    return documents[False], documents[True]
