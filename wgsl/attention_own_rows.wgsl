// No kernel: which rows' scores a lane of `attention_stream` ends with: here those of all rows that it holds, where lanes do not
// divide rows among them; appended to it after attention_rows_<ROWS>.wgsl. attention_own_<part of ROWS>_of_<ROWS>.wgsl are the same for lanes
// that divide rows among them.

alias Own = Rows; // one number for each row of which the lane ends with scores
const OVER = 1u; // lanes that divide rows among them
const OWN = ROWS;

/// What a lane's row numbers are XORed with: its row r is row r ^ turn of the tile, and the rows that it ends with are its first.
fn turn_of(lane: u32) -> u32 {
    return 0u;
}

/// A lane's rows, summed over the lanes that divide them.
fn own_of(x: Rows) -> Own {
    return x;
}

/// The numbers of a lane's rows, each from the lane that has it.
fn spread(x: Own) -> Rows {
    return x;
}

/// Of the numbers of all rows, those of the rows that the lane ends with.
fn kept(x: Rows) -> Own {
    return x;
}

fn own_number(x: Own, row: u32) -> f32 {
    return number_of(x, row);
}

fn with_own(x: Own, row: u32, y: f32) -> Own {
    return with_number(x, row, y);
}

fn own_marked(p: Own, x: Own) -> Own {
    return marked(p, x);
}

fn own_counted(p: Own) -> Own {
    return counted(p);
}
