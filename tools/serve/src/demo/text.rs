//! What the demo talks about: the handbook of a ferry company that does not exist.

use std::fmt::Write;

/// Island, pier, ship, minutes of the crossing, adult fare, first and last departure, a note.
type Route = (
    &'static str,
    &'static str,
    &'static str,
    u32,
    u32,
    &'static str,
    &'static str,
    &'static str,
);

const ROUTES: [Route; 16] = [
    (
        "Amberholm",
        "North Quay",
        "Petrel",
        35,
        12,
        "06:10",
        "22:40",
        "bicycles travel free on weekdays",
    ),
    (
        "Brindle Cay",
        "Old Customs Pier",
        "Curlew",
        50,
        15,
        "07:00",
        "20:30",
        "the last boat waits for the evening train",
    ),
    (
        "Calder Rocks",
        "West Steps",
        "Sandpiper",
        20,
        7,
        "06:45",
        "23:15",
        "no vehicles, the landing is a ladder at low tide",
    ),
    (
        "Dunmarrow",
        "North Quay",
        "Great Auk",
        95,
        28,
        "08:20",
        "17:50",
        "cars must be booked two days ahead",
    ),
    (
        "Eastermain",
        "Harbour Bridge",
        "Dunlin",
        40,
        13,
        "06:30",
        "21:45",
        "school groups board first on term days",
    ),
    (
        "Fallow Skerry",
        "West Steps",
        "Kittiwake",
        65,
        19,
        "09:00",
        "16:00",
        "sailings stop when the swell passes two metres",
    ),
    (
        "Garnet Point",
        "Old Customs Pier",
        "Petrel",
        30,
        10,
        "07:15",
        "22:00",
        "dogs ride on the upper deck",
    ),
    (
        "Hollin Isle",
        "Harbour Bridge",
        "Turnstone",
        75,
        22,
        "08:00",
        "18:30",
        "the kiosk on board sells hot soup",
    ),
    (
        "Inverlow",
        "North Quay",
        "Great Auk",
        110,
        31,
        "07:40",
        "16:20",
        "lorries need the written consent of the mate",
    ),
    (
        "Jessamine",
        "South Mole",
        "Curlew",
        25,
        9,
        "06:00",
        "23:30",
        "season tickets are checked on the pier",
    ),
    (
        "Kestrel Ness",
        "South Mole",
        "Dunlin",
        55,
        16,
        "07:30",
        "19:45",
        "bird watchers may land before sunrise in May",
    ),
    (
        "Larkspur",
        "Harbour Bridge",
        "Sandpiper",
        45,
        14,
        "06:50",
        "21:10",
        "wheelchairs board by the stern ramp",
    ),
    (
        "Merrow Sound",
        "West Steps",
        "Kittiwake",
        85,
        25,
        "08:45",
        "17:15",
        "the crossing shows the seal bank at low water",
    ),
    (
        "Nether Wick",
        "South Mole",
        "Turnstone",
        60,
        18,
        "07:20",
        "20:00",
        "mail is handed over before passengers leave",
    ),
    (
        "Orrin Head",
        "Old Customs Pier",
        "Petrel",
        70,
        21,
        "08:10",
        "18:50",
        "fuel cans are carried on Tuesdays alone",
    ),
    (
        "Pell Island",
        "North Quay",
        "Dunlin",
        15,
        5,
        "05:50",
        "00:20",
        "this is the only crossing that sails at night",
    ),
];

/// The system prompt that all sessions share.
pub fn handbook() -> String {
    let mut text = String::from(
        "You answer questions of passengers for Lantern Ferries, a small company with sixteen \
         routes out of the town of Saltmere. Use only this handbook. Answer in one or two short \
         sentences. If the handbook does not say it, say that the ticket office will know.\n\n\
         General rules. The ticket office on Harbour Bridge is open from 05:30 until 22:00. \
         Children under six travel free, children under fourteen pay half. A ticket is valid on \
         the day that is printed on it and may be moved to another day once, until one hour before \
         departure. Boarding ends four minutes before departure. When a sailing is cancelled, the \
         fare is paid back in full at any office, and the company finds a bed for those who cannot \
         get home. Lost things are kept for ninety days in the room behind the ticket office. \
         Smoking is allowed on the after deck only. Large luggage goes into the cage beside the \
         gangway, and the crew hands out numbered tags for it.\n\n",
    );
    for (number, (island, pier, ship, minutes, fare, first, last, note)) in (1..).zip(ROUTES) {
        writeln!(
            text,
            "Route {number}: {island}. Boats for {island} leave from {pier}. The ship on this route \
             is the {ship}. The crossing takes {minutes} minutes. An adult pays {fare} crowns one \
             way and {} crowns for a return ticket. The first boat leaves at {first} and the last \
             one at {last}. Please note that {note}. In a storm, ask at {pier} before you pay for \
             {island}.\n",
            fare * 2 - fare / 4
        )
        .expect("writing to a string does not fail");
    }
    text += "If somebody asks for the way to a pier: North Quay is behind the fish market, Old \
             Customs Pier is at the end of Rope Street, West Steps are below the lighthouse, \
             Harbour Bridge is in front of the railway station, and South Mole is reached by the \
             number nine tram.";
    text
}

/// Each session's questions, turn by turn.
pub(super) const SESSIONS: [[&str; 2]; 3] = [
    [
        "Where do I board for Hollin Isle, and how long does it take?",
        "Thank you. What does a return ticket cost there?",
    ],
    [
        "When does the last boat to Brindle Cay leave?",
        "And may I take my dog along to Garnet Point?",
    ],
    [
        "I missed the boat to Pell Island. Is there another one tonight?",
        "How do I find that pier from the railway station?",
    ],
];
