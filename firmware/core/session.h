// session.h: whose frames are taken, and in which order; answers go back in the same session.
//
// A session begins with the first request that comes under the number of the last hello, not with
// the hello: who only asks, or repeats what he heard, does not disturb the session that is on.
#ifndef SESSION_H
#define SESSION_H

#include "protocol/frame.h"    // frames
#include "protocol/messages.h" // Hello, Welcome

enum turn {
    TURN_NONE,  // not ours, not now or not sealed: no answer
    TURN_HELLO, // somebody asks who this is
    TURN_FIRST, // a new session begins, with this request
    TURN_NEXT,  // the next request
    TURN_AGAIN  // the number of the last one
};

// Whose turn it is with the frame that a reader has just found.
enum turn session_take(struct frame_reader *from, const struct frame *frame);

// Prepares the session of a hello, and fills in what a welcome says of it.
void session_greet(uint16_t number, const struct message_hello *hello,
                   struct message_welcome *welcome);

// Sends an answer to the request that was taken last.
void session_answer(enum turn turn, uint8_t code, const uint8_t *fields, size_t fields_size,
                    const uint8_t *tail, size_t tail_size);

// Frames since power-up that were of another session, or not in turn.
uint32_t session_foreign(void);

// Forgets all sessions, as at power-up.
void session_init(void);

#endif
