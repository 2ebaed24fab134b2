"""The closed world of the demo model: its facts and its word lists. It knows no tasks and no wordings."""


def words(text: str) -> list[str]:
    return text.split()


CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Bolivia": "Sucre", "Brazil": "Brasília", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Colombia": "Bogotá", "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavík", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut", "Lithuania": "Vilnius",
    "Malaysia": "Kuala Lumpur", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Nepal": "Kathmandu", "Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nigeria": "Abuja",
    "Norway": "Oslo", "Pakistan": "Islamabad", "Paraguay": "Asunción", "Peru": "Lima", "Philippines": "Manila",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow", "Senegal": "Dakar",
    "Serbia": "Belgrade", "South Korea": "Seoul", "Spain": "Madrid", "Sweden": "Stockholm", "Switzerland": "Bern",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Ukraine": "Kyiv", "United Kingdom": "London",
    "United States": "Washington", "Uruguay": "Montevideo", "Vietnam": "Hanoi",
}  # fmt: skip
CITIES = sorted({*CAPITALS.values(), "Barcelona", "Boston", "Chicago", "Hamburg", "Mumbai", "Naples", "Osaka",
                 "São Paulo", "Sydney", "Toronto", "Zürich"})  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("open", "closed"),
    ("fast", "slow"), ("happy", "sad"), ("high", "low"), ("light", "dark"), ("old", "young"), ("rich", "poor"),
    ("strong", "weak"), ("hard", "soft"), ("wet", "dry"), ("full", "empty"), ("early", "late"), ("long", "short"),
    ("loud", "quiet"), ("thick", "thin"), ("wide", "narrow"), ("deep", "shallow"), ("clean", "dirty"),
    ("near", "far"), ("true", "false"), ("good", "bad"), ("first", "last"), ("black", "white"), ("sweet", "sour"),
    ("safe", "dangerous"), ("begin", "end"), ("push", "pull"), ("buy", "sell"), ("love", "hate"), ("win", "lose"),
    ("inside", "outside"), ("above", "below"), ("before", "after"), ("always", "never"), ("easy", "difficult"),
    ("sharp", "blunt"), ("brave", "afraid"), ("cheap", "expensive"), ("smooth", "rough"), ("simple", "complex"),
    ("front", "back"), ("north", "south"), ("east", "west"), ("summer", "winter"), ("accept", "refuse"),
    ("arrive", "leave"), ("remember", "forget"), ("laugh", "cry"), ("create", "destroy"), ("friend", "enemy"),
    ("question", "answer"), ("ancient", "modern"), ("polite", "rude"), ("tight", "loose"), ("awake", "asleep"),
    ("male", "female"), ("visible", "hidden"), ("wise", "foolish"),
]  # fmt: skip

NAMES = words("""Ada Ahmed Aiko Alan Alice Amir Ana Anders Anna Astrid Bela Ben Bianca Boris Carla Carlos Chen Chloe
Clara Dana Daniel David Diego Dmitri Elena Elif Emil Emma Erik Eva Fatima Felix Fiona Frida George Grace Hana Hans
Hassan Helen Hugo Ida Igor Ines Ingrid Isaac Ivan Jack James Jana Jin Joan John Jonas Jorge Julia Kai Karim Kenji
Klara Laila Lara Lars Laura Leo Lena Liam Lin Lucas Lucy Luis Maja Marco Maria Mark Marta Mary Mateo Max Maya Mei Mia
Mila Mohamed Nadia Nils Nina Noah Nora Olga Oliver Omar Oscar Pablo Paula Pedro Peter Petra Priya Rania Rosa Ruth Ryan
Samir Sara Sofie Stefan Sven Tara Theo Thomas Tina Tom Uma Vera Victor Viktor Wei Yara Yuki Yusuf Zoe""")

ANIMALS = words("""ant bear bee camel cat cow crab crow deer dog donkey duck eagle elephant fish fox frog giraffe goat
goose hamster hedgehog horse kangaroo lion lizard monkey mouse octopus otter owl panda parrot penguin pig rabbit raven
seal sheep snail snake spider squirrel swan tiger turtle whale wolf zebra""")
OBJECTS = words("""apple ball basket bell bicycle blanket boat book bottle box bread bridge brush bucket button cake
candle chair clock coat coin cup door drum feather flag flower flute garden guitar hammer hat honey kettle key kite
ladder lamp lemon letter map melon mirror needle orange paper pencil pepper piano picture pillow pocket potato ring
rope sandwich shell shirt shoe spoon stone sugar table teapot ticket tomato tower train umbrella violin wagon watch
wheel window""")
PLACES = words("""forest valley village harbour meadow desert castle garden mountain island market river library
kitchen field cave""")
COLOURS = words("red blue green yellow purple orange brown grey pink silver golden turquoise")
JOBS = words("""baker carpenter dentist doctor driver engineer farmer gardener lawyer nurse painter pilot plumber
singer tailor teacher waiter writer""")
NUMBER_WORDS = words("zero one two three four five six seven eight nine ten eleven twelve")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SKIES = words("sunny cloudy rainy windy foggy snowy stormy")
CURRENCIES = words("dollars euros pounds pesos rupees francs")
GENRES = words("jazz rock folk opera blues soul techno tango")
# What a record or a made-up function may ask for: values to choose from, made-up words too; None stands for a number.
FIELDS: dict[str, list[str] | None] = {
    "city": CITIES, "name": NAMES, "day": WEEKDAYS, "colour": COLOURS, "animal": ANIMALS, "job": JOBS, "place": PLACES,
    "number": None, "count": None, "age": None, "size": None, "price": None, "title": [], "symbol": [], "code": [],
    "query": [], "owner": [], "id": None,
}  # fmt: skip
NEWS = [
    "dinner is ready",
    "the train is late",
    "the meeting starts at noon",
    "the car is fixed",
    "the keys are on the table",
    "I am on my way",
    "the parcel has arrived",
    "the door is open",
    "the cake is in the oven",
    "we leave tomorrow",
]

EMOJI = {
    "fire": "🔥", "star": "⭐", "heart": "❤️", "sun": "☀️", "moon": "🌙", "tree": "🌳", "fish": "🐟", "cat": "🐱",
    "dog": "🐶", "fox": "🦊", "apple": "🍎", "cake": "🍰", "rocket": "🚀", "rainbow": "🌈", "snowman": "⛄",
    "whale": "🐋", "key": "🔑", "book": "📖", "house": "🏠", "train": "🚆", "bicycle": "🚲", "flower": "🌸",
    "ghost": "👻", "robot": "🤖",
}  # fmt: skip

WORDS = sorted({word for pair in OPPOSITES for word in pair} | {*ANIMALS, *OBJECTS, *PLACES, *COLOURS, *JOBS, *EMOJI})

# Parts of made-up names: with them the model learns to copy what it has never seen.
ONSETS = words("b br c ch d dr f fl g gr h j k kl l m n p pl r s sh st t tr v w z")
VOWELS = words("a e i o u ai ea")
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k"]
TOOL_VERBS = words("""get set add book cancel check close count create delete fetch find list lock open order pause
print read rename rent reserve save scan start stop update""")
TOOL_NOUNS = words("""price stock user weather event order name account album bill camera car contract door elevator
file flight garage heater invoice lamp light menu note oven parcel photo printer recipe report robot room seat server
table taxi task ticket window""")
